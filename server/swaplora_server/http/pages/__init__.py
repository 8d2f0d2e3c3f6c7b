"""What a person looks at in a browser: nothing in it comes from another server."""
