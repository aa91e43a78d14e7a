"""What must survive: the ledger of verdicts."""
