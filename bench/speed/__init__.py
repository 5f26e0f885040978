"""`backline bench speed`: how long every stage takes, beside torch and beside what the hardware allows."""
