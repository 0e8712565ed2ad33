"""`backstay doctor`: checks of machine, software and daemons."""
