"""What a run writes about itself: its folder, metrics, statistics of each epoch, plots, rows of results."""
