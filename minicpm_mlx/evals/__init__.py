"""MiniCPM's published table, measured again: tasks, their data and how replies are scored."""
