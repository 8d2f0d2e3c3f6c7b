"""What was changed, in a row: a log, snapshots of what it came to, and what is known of changes that are not in it."""
