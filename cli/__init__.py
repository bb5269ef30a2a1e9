"""The command line: parse, call the library, render. The only importer of rich."""
