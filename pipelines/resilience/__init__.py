"""What dies is done again, with care, until the row that kills is found."""
