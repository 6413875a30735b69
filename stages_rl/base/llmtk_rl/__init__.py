"""What reinforcement stages share."""
