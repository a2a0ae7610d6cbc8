import java.util.Properties

plugins {
    alias(libs.plugins.android.application)
    alias(libs.plugins.kotlin.compose)
    alias(libs.plugins.kotlin.serialization)
}

// keystore.properties, beside settings.gradle.kts and never committed: storeFile, storePassword, keyAlias, keyPassword.
val keystore = Properties()
rootProject.file("keystore.properties").takeIf { it.exists() }?.reader()?.use(keystore::load)

android {
    namespace = "org.gemmaedge.app"
    compileSdk = libs.versions.compileSdk.get().toInt()

    defaultConfig {
        applicationId = "org.gemmaedge.demo"
        minSdk = libs.versions.minSdk.get().toInt()
        targetSdk = libs.versions.targetSdk.get().toInt()
        versionCode = 1
        versionName = "0.1"
    }

    // One APK for each kind of processor: a phone needs one set of libraries, not two.
    splits {
        abi {
            isEnable = true
            reset()
            include("arm64-v8a", "x86_64")
            isUniversalApk = false
        }
    }

    signingConfigs {
        create("release") {
            if (!keystore.isEmpty) {
                storeFile = rootProject.file(keystore.getProperty("storeFile"))
                storePassword = keystore.getProperty("storePassword")
                keyAlias = keystore.getProperty("keyAlias")
                keyPassword = keystore.getProperty("keyPassword")
            }
        }
    }

    buildTypes {
        release {
            isMinifyEnabled = true
            isShrinkResources = true
            proguardFiles(getDefaultProguardFile("proguard-android-optimize.txt"), "proguard-rules.pro")
            // Without a keystore, the debug key signs: enough to try the app, and no store takes it.
            signingConfig = signingConfigs.getByName(if (keystore.isEmpty) "debug" else "release")
        }
    }

    buildFeatures {
        compose = true
    }

    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_11
        targetCompatibility = JavaVersion.VERSION_11
    }

    packaging {
        jniLibs {
            // Compressed in the APK: a third of the download. The price is a copy in the app's folder when installed.
            useLegacyPackaging = true
            // fbjni and the runtimes may each bring the C++ library; one copy serves all.
            pickFirsts += "**/libc++_shared.so"
            // ONNX Runtime brings four kinds of processors; an app bundle would carry all of them.
            excludes += setOf("lib/armeabi-v7a/**", "lib/x86/**")
        }
        resources {
            excludes += setOf("META-INF/{AL2.0,LGPL2.1}", "META-INF/*.version", "kotlin/**", "DebugProbesKt.bin")
        }
    }
}

dependencies {
    implementation(project(":engines"))
    implementation(platform(libs.compose.bom))
    implementation(libs.androidx.activity.compose)
    implementation(libs.compose.foundation)
    implementation(libs.compose.material3)
    implementation(libs.compose.ui)
    implementation(libs.kotlinx.coroutines.android)
}
