"""The same run on more and more devices: measured where they are, predicted by the planner where they are not."""
