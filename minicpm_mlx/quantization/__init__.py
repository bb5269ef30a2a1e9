"""Making a checkpoint smaller: which bits for which matrix, how they are rounded, what it cost."""
