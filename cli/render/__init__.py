"""What the terminal shows: theme, Markdown, spinner, interface texts."""
