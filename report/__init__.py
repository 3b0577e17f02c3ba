"""What each choice of formats and methods costs in accuracy and gains in speed, and why it is as fast as it is."""
