"""Cases of training, a file each as in `hellm.training`."""
