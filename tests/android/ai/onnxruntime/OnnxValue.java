package ai.onnxruntime;

/** The part of onnxruntime-android's API that generated Kotlin uses, with its signatures, for the compiler. */
public interface OnnxValue extends AutoCloseable {
    @Override
    void close();
}
