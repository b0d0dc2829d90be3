"""The app as a file: the shell that Maven builds, the engine of phones and a verified bundle become one signed APK; no Android SDK."""

APPLICATION_ID = "org.cdcda.app"
