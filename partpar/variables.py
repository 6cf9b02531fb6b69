r"""Environment variables by which whoever starts workers tells them something; a file that imports nothing, for commands
that start quickly."""

# Workers may talk over a network, whose traffic is neither authenticated nor encrypted.
NETWORK_FLAG = "PARTPAR_ALLOW_NETWORK"
# OMP_NUM_THREADS is the user's own: torchrun sets it to 1 by itself, which cannot be told from a user's 1.
THREADS_FLAG = "PARTPAR_KEEP_THREADS"
