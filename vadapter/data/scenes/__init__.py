"""The procedural "scenes" data set: images and clips of colored shapes, with texts."""
