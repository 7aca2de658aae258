"""What every folder uses. Imports nothing of ours."""
