import com.android.apksig.ApkSigner;
import com.android.apksig.ApkVerifier;
import java.io.File;
import java.io.FileInputStream;
import java.security.KeyStore;
import java.security.PrivateKey;
import java.security.cert.X509Certificate;
import java.util.List;

/** Signs an APK with the one key of a PKCS12 file and verifies the result: Sign.java KEYS PASSWORD IN OUT MIN_SDK. */
final class Sign {
    public static void main(String[] arguments) throws Exception {
        char[] password = arguments[1].toCharArray();
        KeyStore keys = KeyStore.getInstance("PKCS12");
        try (FileInputStream file = new FileInputStream(arguments[0])) {
            keys.load(file, password);
        }
        String alias = keys.aliases().nextElement();
        PrivateKey key = (PrivateKey) keys.getKey(alias, password);
        X509Certificate certificate = (X509Certificate) keys.getCertificate(alias);
        ApkSigner.SignerConfig signer = new ApkSigner.SignerConfig.Builder("demo", key, List.of(certificate)).build();
        int minSdk = Integer.parseInt(arguments[4]);
        File output = new File(arguments[3]);
        new ApkSigner.Builder(List.of(signer))
                .setInputApk(new File(arguments[2]))
                .setOutputApk(output)
                .setMinSdkVersion(minSdk)
                .setV1SigningEnabled(false)
                .setV2SigningEnabled(true)
                .setV3SigningEnabled(true)
                .setAlignmentPreserved(true)
                .build()
                .sign();
        ApkVerifier.Result result = new ApkVerifier.Builder(output).setMinCheckedPlatformVersion(minSdk).build().verify();
        System.out.printf(
                "signature verified: %s (v2 %s, v3 %s)%n",
                result.isVerified(), result.isVerifiedUsingV2Scheme(), result.isVerifiedUsingV3Scheme());
        result.getErrors().forEach(System.err::println);
        System.exit(result.isVerified() ? 0 : 5);
    }
}
