"""What stands in front of the replicas: reads who is to answer, and passes on what is asked and answered."""
