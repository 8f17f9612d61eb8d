from hypothesis import settings

# No deadline: on a busy machine the time of one example says nothing about the code. Derandomized: a suite that fails
# does so for everybody.
settings.register_profile("grpo", deadline=None, derandomize=True)
settings.load_profile("grpo")
