"""Running code that a model wrote, in a process that can harm nothing."""
