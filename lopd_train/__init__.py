"""lopd_train: train a student from an artifact, without a teacher."""
