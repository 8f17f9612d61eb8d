"""What `megatron-sage doctor` looks at: machine, versions, weights, configuration, collectives."""
