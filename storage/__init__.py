"""Files: the only package that knows paths and file formats."""
