"""The phone lab: which phone holds a model, how fast it will answer there, and the runs and measurements that say so."""
