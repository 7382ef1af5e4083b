"""What Kubernetes runs: an image, a RayJob, and the CronJob that creates one every night."""
