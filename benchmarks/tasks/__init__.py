"""The tasks that methods are compared on, one small file each."""
