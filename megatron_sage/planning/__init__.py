"""What a layout costs, as formulas: nothing here needs a process group or a GPU."""
