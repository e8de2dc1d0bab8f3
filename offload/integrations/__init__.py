"""What frameworks need so that a plan applies to them: nothing of theirs is patched."""
