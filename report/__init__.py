"""What each choice of formats and methods costs in accuracy and gains in speed, and the reason for either."""
