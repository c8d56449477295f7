"""What a bundle holds: a script that runs alone on a device."""
