"""Long runs of every public optimizer: leaks, threads, forks, and exits in the middle of a step."""
