"""The host: finds stages and plugins, checks them against the contract, and calls their hooks."""
