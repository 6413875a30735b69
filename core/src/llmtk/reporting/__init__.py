"""What a run says and writes beside its model: lines, metrics, a plot, a card."""
