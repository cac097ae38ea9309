"""The hub's side of the add-on: a manager that keeps CA, certificates and proxy servers as configured."""
