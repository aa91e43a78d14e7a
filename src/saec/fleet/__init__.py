"""What must survive: the ledger of verdicts, and frames on their way up."""
