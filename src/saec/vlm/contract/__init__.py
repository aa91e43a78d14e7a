"""What an exported VLM is: its decoder's shape and signature, and the folder it lies in. No heavy imports."""
