"""The method's figures, each made by one command: a picture and the numbers in it."""
