"""What the commands measure of what a user gives them: one folder a command."""
