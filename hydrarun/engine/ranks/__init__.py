"""The processes that a run takes: started, given jobs, ended."""
