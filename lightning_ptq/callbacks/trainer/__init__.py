"""What the callbacks do to a Trainer."""
