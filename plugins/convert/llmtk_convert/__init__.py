"""Configurations of other programs become llmtk's: a table for each program, and `llmtk convert`, which reads them."""
