"""Cases of the operators, a file each as in `hellm.ops`: peers, then the cases, then what they are held to."""
