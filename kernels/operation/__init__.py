"""What an operation declares, and how a call of it is checked, dispatched and repeated from its plan."""
