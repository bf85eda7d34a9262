"""Speed only: versions of reference operations for one device. Delete this folder and everything still runs."""
