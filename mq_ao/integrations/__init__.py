"""What makes other tools take our programs: a file each, which imports the tool."""
