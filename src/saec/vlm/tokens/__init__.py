"""Visual tokens in place of images: which of a part's tokens go up, how they are coded, and what reads them."""
