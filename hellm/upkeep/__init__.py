"""What keeps a run up to date: newer data, the same models trained on, and reports on what it shows."""
