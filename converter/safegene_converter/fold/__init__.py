"""What every form of artifact needs: survival of the delta, streams, lines of the manifest."""
