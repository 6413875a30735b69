"""The loop that trains every stage, and what it stands on."""
