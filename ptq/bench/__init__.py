"""How fast layers are: measured on a GPU, predicted and compiled without one."""
