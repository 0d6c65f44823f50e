"""What a run leaves behind for people: metrics, clips and one page."""
